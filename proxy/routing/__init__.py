"""Which node a request gets: one function a decision, given the nodes and what was asked. Imports nodes only."""
