"""What a layout costs before it runs: what each rank holds and sends, from the model on the meta device, without processes."""
