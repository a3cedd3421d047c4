"""Pruning and quantisation methods: pure functions on one matrix and all recipes that want it, one file each."""
