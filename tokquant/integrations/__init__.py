"""tokquant inside of other libraries."""
