"""One SGLang server by HTTP: its contract, requests, checked replies and control calls."""
