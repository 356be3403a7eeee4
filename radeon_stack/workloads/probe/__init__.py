"""Does this environment do what training needs?"""
