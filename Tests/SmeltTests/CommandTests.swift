@testable import smelt
