"""What any server process of ours needs, whatever it serves."""
