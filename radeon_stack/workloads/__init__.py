"""What runs inside the container. Of our own code it imports `contracts`, `runs.events`, `errors` and `atomic` alone."""
