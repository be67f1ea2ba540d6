"""The instrument: what a cache does to a model's output, for this package and its peers, in one run on the same windows."""
