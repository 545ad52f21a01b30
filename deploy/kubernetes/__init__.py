"""The manifests, and what checks them without a cluster: `python -m deploy.kubernetes.check`."""
