"""A home to try it on: simulated sensors and a drawn camera, an embedded broker, and the demo that joins them."""
