"""The toy worlds: each can draw its scenes, put them into words, and read both back exactly."""
