"""What `validate-docker.sh` runs: checks of all that delivers this project, each in a file named after its concern."""
