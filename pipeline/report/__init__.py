"""What people see: pages, tables, progress."""
