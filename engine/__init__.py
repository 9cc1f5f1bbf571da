"""How the method runs. The method itself is one folder up."""
