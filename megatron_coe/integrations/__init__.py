"""The CoE model in other frameworks."""
