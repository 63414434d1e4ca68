"""The page: one HTML file without a build step, and what it asks for. It may import serving's view and guard only."""
