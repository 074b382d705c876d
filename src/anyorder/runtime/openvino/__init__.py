"""Steps through OpenVINO: exported once a model, with every size dynamic, and kept on disk as data."""
