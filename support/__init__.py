"""A drawer: what makes the six scripts fast, large, safe and polite; no equation needs it."""
