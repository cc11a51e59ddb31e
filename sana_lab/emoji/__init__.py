"""Real pictures: the emoji of Noto and Twemoji as a plug-in, from archives that the user fetched."""
