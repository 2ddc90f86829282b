"""The method: recipe, loss, updates and their adjoints, tape, derivatives."""
