"""LaunchPlan, and the engines that carry one out."""
