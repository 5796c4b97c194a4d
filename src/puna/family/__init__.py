"""What the Llama family is: shapes, limits, licences and claims of every member. Plain data, no torch."""
