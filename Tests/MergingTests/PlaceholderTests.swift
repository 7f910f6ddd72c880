@testable import Merging
