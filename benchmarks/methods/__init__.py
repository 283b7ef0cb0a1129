"""ALTER beside other ways of unlearning: what each forgets, keeps and costs."""
