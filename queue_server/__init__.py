"""The queue server: jobs accepted once, done once, their outcome kept for a while; and the workers that do them."""

__version__ = "0.1.0"
