"""What a subcommand does when it needs several rooms."""
