"""How Holdfast is run: on one machine without containers (`deploy.local`), with Docker, and on Kubernetes."""
