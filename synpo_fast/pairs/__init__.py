"""Making and checking manifests of preference pairs."""
