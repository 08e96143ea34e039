"""Progress bars for long-running work."""
