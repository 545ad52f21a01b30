"""OpenAI's chat completions and model list, for clients that speak them; answered by this server's own methods."""
