"""What runs on Ray: the session, reservations, process groups that train, and the pool of workers."""
