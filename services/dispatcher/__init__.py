"""The dispatcher: has the jobs of the store worked on, and takes over what their journals say."""
