"""What answers conversations about pictures: a model in this process, or a server elsewhere."""
