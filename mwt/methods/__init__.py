"The methods that come with the library; importing one registers it."
from . import composable, moda, mwt
