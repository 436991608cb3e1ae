"""Sources check, bound and count records and hand them to pipelines; a package for each kind."""
