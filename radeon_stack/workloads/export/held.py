"""The text on which perplexity is measured where none is given: written for this, so no model knows it by heart."""

TEXT = """\
The workshop stood at the end of a lane that nobody had paved. In winter the mud froze into ridges, and the
delivery van stopped at the corner, so that everything heavy came the last hundred metres on a sledge. Marta
had inherited the place together with its debts, a lathe older than she was, and a notebook in which her
grandfather had written down the weather and the price of brass, every day for thirty-one years.

She repaired clocks. People thought that this meant patience, but what it needed was suspicion. A clock that
stops has a reason; a clock that runs two minutes fast in March and two minutes slow in August has several,
and they lie to one another. She would take the movement apart on a sheet of grey felt, lay each wheel in the
order in which it came out, and then do nothing for a while except look.

"You could buy a new one for less," she told most of those who came in. Hardly anybody left again. They had
not come for the time, which they carried in their pockets anyway. They had come because something in the
house used to tick, and now it was quiet there.

On the second Monday of February a man brought a box that he would not put down. Inside was a chronometer, the
kind that ships had carried before radio, hung in two brass rings so that it stayed level whatever the sea
did. One of the rings was cracked. The balance moved freely when she tilted it, which was a good sign, and the
spring was blue and even. What was missing was a single screw, no longer than a grain of rice, and without it
the whole machine could be trusted for perhaps an hour.

She measured the thread three times. Nobody had cut that pitch since before the war. The catalogue of the last
supplier listed forty screws, of which none fitted, and a footnote regretted this. So she did what the
notebook recommended on a page about something else entirely: she made the tool first. It took the rest of the
week. The screw itself, once the tool was right, took eleven minutes, and when she turned it home with the
smallest driver she owned, it met the brass with no more resistance than a word that is finally the correct
one.
"""
