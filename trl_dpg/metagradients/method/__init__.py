"""The method of the paper: recipe, loss, optimizer updates and their adjoints, tape, derivatives of the loss."""
