"""What runs inside the container; it shares `contracts`, `runs.events`, `errors` and `atomic` with the host side."""
