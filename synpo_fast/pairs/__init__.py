"""Imports and checks manifests of preference pairs."""
