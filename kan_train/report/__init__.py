"""What a run did and cost, for people to look at: one HTML page, and a live view in the terminal. Reads run directories, writes into none but its page."""
