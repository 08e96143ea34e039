"""What more safety data does to safety and to helpfulness."""
