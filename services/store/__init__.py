"""What people want of their jobs, durably: jobs, keys, leases, webhooks. What happened stands in the journals."""
