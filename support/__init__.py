"""A drawer: what makes the six scripts fast, large, safe and polite. Nothing here is needed to understand an equation."""
