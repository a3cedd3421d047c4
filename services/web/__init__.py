"""Pages for people: made on the server, without a build step."""
