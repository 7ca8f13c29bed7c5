"""The ground that the other packages stand on: trees, random streams, digests, execution."""
