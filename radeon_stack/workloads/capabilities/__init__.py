"""What does this card really do? Each question in a process of its own, checked against float64."""
