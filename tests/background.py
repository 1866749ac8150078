"""What takes long runs beside the tests that do not need it: one command after another, from before
the first test on, until a fixture asks for what became of it."""

import subprocess
from concurrent.futures import ThreadPoolExecutor


class Background:
    def __init__(self):
        self.pool, self.process, self.ends = ThreadPoolExecutor(1), None, {}

    def begin(self, name, place, command):
        """Run a command in this folder once those before it have ended."""
        self.ends[name] = self.pool.submit(self._run, place, list(map(str, command)))

    def _run(self, place, command):
        self.process = subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        said, errors = self.process.communicate()
        return place, self.process.returncode, said, errors

    def end(self, name):
        """Wait for a command -> where it ran, its exit code, what it wrote to stdout and stderr."""
        return self.ends[name].result()

    def stop(self):
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.process:
            self.process.terminate()            # torchrun then stops its own
