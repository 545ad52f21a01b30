"""The queue server with its workers: jobs are accepted once, done once, their outcome kept for a while."""

__version__ = "0.1.0"
