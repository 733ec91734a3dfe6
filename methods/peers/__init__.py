"""Other libraries' own layers, each in its own format, as methods: what a result here is compared with."""
