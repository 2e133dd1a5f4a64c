"""Wrong answers as learners write them: (text in the solution, what replaces it, words of the outcome)."""
