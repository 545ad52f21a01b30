"""What keeps the platform from working on this machine: bounded checks, each with what was found and what to do about it."""
