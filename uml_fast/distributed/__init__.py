"""Many ranks as one run."""
