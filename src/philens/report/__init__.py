"""What people see: tables in a terminal, figures, and HTML pages."""
